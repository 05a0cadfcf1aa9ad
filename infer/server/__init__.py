"""OpenAI's API over an engine, and a page to talk to it."""
