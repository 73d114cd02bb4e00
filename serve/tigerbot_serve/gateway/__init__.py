"""The OpenAI surface over an engine: keys, limits, validation, answers, server-sent events, the chat page."""
