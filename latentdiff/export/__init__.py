"""The whole arrow as one SavedModel that needs TensorFlow and nothing else: prompt (string) -> image (PNG bytes)."""
