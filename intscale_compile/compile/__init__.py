"""What stands around the passes when something compiles: options, binding, Inductor, kernels compiled ahead."""
