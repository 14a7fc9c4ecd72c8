"""What everything stands on: errors, configuration, randomness, image files, progress. Knows no model."""
