"""EfficientNet-Lite0 with its published ImageNet weights, on real photographs."""
