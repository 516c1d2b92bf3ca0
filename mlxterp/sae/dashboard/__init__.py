"""All features of a coder in a browser: a bundle of data, a local server, and one offline file."""
