"""Finding several items in one image: a feature pyramid with shared heads on scenes made of Fashion-MNIST."""
