"""SHiRA and Super-Tuning of PEFT, which hold single entries."""
