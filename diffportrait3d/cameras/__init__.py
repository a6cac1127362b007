"""Cameras: EG3D labels, angles and rays, paths of keyframes, files of other programs."""
