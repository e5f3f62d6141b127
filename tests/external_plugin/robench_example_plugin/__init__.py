"""An example plugin of robench: the defense `example_blur` and the attack `example_noise`."""
