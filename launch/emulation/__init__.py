"""What `launch/wan.py` is made of: machines and links that exist only inside this one."""
