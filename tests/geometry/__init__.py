"""Tests of the networks of point clouds."""
