"""The paper: its tables and its claims."""
