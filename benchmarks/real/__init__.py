"""Studies of real models, from local folders: a row a case appended to a file, so that an interrupted study goes on."""
