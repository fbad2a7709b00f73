"""What `zest-fast bench` measures: kernels, profiles, steps and plans, each compared with what is right before it is
timed, and two results with each other. The benchmarks of the repository (bench/) use the same clocks and peers."""
