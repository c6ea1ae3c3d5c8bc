"""Files of kohya's sd-scripts and of LyCORIS: adapters of diffusion models and their text encoders, in one file."""
