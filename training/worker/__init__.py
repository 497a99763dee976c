"""Inside the sandbox: the only place where candidate code is executed. It returns arrays, and nothing that is
believed."""
