"""Origins that are objects: on web servers, and in the stores of S3, Google and Azure, all through obstore."""
