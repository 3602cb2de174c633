mod attacks;
mod properties;
mod round_trip;
