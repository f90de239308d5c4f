"""Fixtures for every part lie in tests/support, one file an idea; pyproject.toml puts it on the path."""

pytest_plugins = ["database_fixtures", "server_fixtures", "tiny_fixtures", "training_fixtures"]
