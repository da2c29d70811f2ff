"""Pages and images: read within limits, drawn from texts; and items of other modalities."""
