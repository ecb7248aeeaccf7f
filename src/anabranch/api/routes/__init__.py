"""The routes, one file a group: each reads a body, asks a model, and writes OpenAI's shape."""
