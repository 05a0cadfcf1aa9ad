"""The parts of a block: each declares its parameters with logical axes and computes; none holds state."""
