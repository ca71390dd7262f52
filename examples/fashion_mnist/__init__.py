"""Fashion-MNIST: 70,000 gray images of clothing, 28×28, ten classes, and a compact CNN for them."""
