"""Two loops, pretraining and fine-tuning, and the switches of their recipe."""
