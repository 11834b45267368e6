"""How bytes get from rank to rank: `star` is the protocol, `mpi`, `store` and `local` are the roads it takes."""
