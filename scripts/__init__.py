"""Entry points. Each parses its arguments, makes a plan and calls the library; nothing imports them."""
