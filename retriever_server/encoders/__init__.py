"""Encoders of texts and images, and the EncodingSpec that records how they encode."""
