//! The specification of [`unpatchify`](super::unpatchify): the index formula.

/// `y[b, c, row, column] = x[b, token, (i, j, c)]`, where `(row, column)` is pixel `(i, j)` of the token's patch.
pub fn forward<R: Copy>(x: &[R], batch: usize, channels: usize, height: usize, width: usize, patch: usize) -> Vec<R> {
    let across = width / patch;
    let tokens = across * (height / patch);
    let mut y = Vec::new();
    for b in 0..batch {
        for c in 0..channels {
            for row in 0..height {
                for column in 0..width {
                    let token = row / patch * across + column / patch;
                    let place = (row % patch * patch + column % patch) * channels + c;
                    y.push(x[(b * tokens + token) * patch * patch * channels + place]);
                }
            }
        }
    }
    y
}
