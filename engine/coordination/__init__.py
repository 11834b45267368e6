"""How ranks agree: `coordinator` is called, `star` is its protocol, `mpi`, `store` and `local` the roads it takes."""
