"""A small Mllama that is really trained, on scenes of handwritten digits: data, training, evaluation."""
