"""What a command does with a model and data once its options are read: loading, training, recording, saving."""
