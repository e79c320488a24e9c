"""The bodies of requests and answers: every field bounded, names as OpenAI's."""
