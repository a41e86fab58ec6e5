"""Does a task's change lie in sparse regions? Tables and claims."""
