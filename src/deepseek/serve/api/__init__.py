"""The HTTP side: OpenAI's routes over the engine and the stores."""
