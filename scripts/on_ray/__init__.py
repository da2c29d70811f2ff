"""Work on a Ray cluster: the processes of a training run, and the shards of an index that is encoded."""
