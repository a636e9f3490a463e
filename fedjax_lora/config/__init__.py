"""From a file to an experiment: YAML, the configuration, presets, and the functions that it names."""
