"""Serving: a batcher of replies, an OpenAI endpoint and a page.

Rooms, in reading order: slots, batcher, openai_api, server.
Doors: openai_api, server.
"""
