"""A small trained member of the model family, and everything that makes it: a world, training, evaluation."""
