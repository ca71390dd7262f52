"""What can be done for accuracy after training, without labels: each a switch in section ``calibrate``."""
