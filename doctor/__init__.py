"""What a params file needs and costs, told before anything is downloaded or run."""
