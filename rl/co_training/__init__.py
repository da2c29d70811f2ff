"""Policy and retriever train each other: searches of trajectories become training data of the retriever."""
