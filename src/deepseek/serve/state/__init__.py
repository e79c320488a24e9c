"""What outlives the server: keys, usage, files, batches and responses, in SQLite or PostgreSQL."""
