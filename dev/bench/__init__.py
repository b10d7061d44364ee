"""Each module measures one part of the project beside what a user would pick instead."""
