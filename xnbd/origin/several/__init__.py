"""One disk that lies in several places."""
