"""/v1/responses told in terms of chat: a request becomes a chat request, its answer a response.

Pure: no web framework, no store.
"""
