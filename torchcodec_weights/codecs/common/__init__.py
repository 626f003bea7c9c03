"""What the codecs that we compile share; native/ is C++."""
