"""Settings: the schema, YAML files and overrides, and the checks of what they say."""
