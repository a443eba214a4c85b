//! The fixed position embedding.

/// `[side * side, channels]`: sines and cosines of the column in the first half of the channels, of the row in the second,
/// as in the published model (Peebles and Xie, ICCV 2023; Vaswani et al., 2017, in two dimensions).
pub fn position_embedding(side: usize, channels: usize) -> Vec<f32> {
    let quarter = channels / 4;
    let mut out = Vec::with_capacity(side * side * channels);
    for row in 0..side {
        for column in 0..side {
            for position in [column, row] {
                let angle = |i: usize| position as f64 / 10_000f64.powf(i as f64 / quarter as f64);
                out.extend((0..quarter).map(|i| angle(i).sin() as f32));
                out.extend((0..quarter).map(|i| angle(i).cos() as f32));
            }
        }
    }
    out
}
