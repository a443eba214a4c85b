//! The specification of [`attention`](super::attention): plain loops.

use super::Dims;
use crate::ops::real::Real;

/// Element `i` of part 0 (query), 1 (key) or 2 (value).
fn at<R: Copy>(qkv: &[R], d: Dims, b: usize, t: usize, part: usize, head: usize, i: usize) -> R {
    qkv[(b * d.t + t) * 3 * d.c + part * d.c + head * (d.c / d.heads) + i]
}

/// The softmax row of one query.
fn probabilities<R: Real>(qkv: &[R], d: Dims, b: usize, t: usize, head: usize) -> Vec<R> {
    let size = d.c / d.heads;
    let mut row = Vec::with_capacity(d.t);
    for s in 0..d.t {
        let mut dot = R::zero();
        for i in 0..size {
            dot += at(qkv, d, b, t, 0, head, i) * at(qkv, d, b, s, 1, head, i);
        }
        row.push(dot / R::from_f64(size as f64).sqrt());
    }
    let max = row.iter().copied().fold(row[0], |a, x| if x > a { x } else { a });
    let mut sum = R::zero();
    for x in &mut row {
        *x = (*x - max).exp();
        sum += *x;
    }
    for x in &mut row {
        *x = (*x / sum).stored();
    }
    row
}

/// `out`, `[B, T, C]`, of `qkv` `[B, T, 3C]`.
pub fn forward<R: Real>(qkv: &[R], d: Dims) -> Vec<R> {
    let size = d.c / d.heads;
    let mut out = vec![R::zero(); d.b * d.t * d.c];
    for b in 0..d.b {
        for t in 0..d.t {
            for head in 0..d.heads {
                let p = probabilities(qkv, d, b, t, head);
                for (s, &p) in p.iter().enumerate() {
                    for i in 0..size {
                        out[(b * d.t + t) * d.c + head * size + i] += p * at(qkv, d, b, s, 2, head, i);
                    }
                }
            }
        }
    }
    out.into_iter().map(R::stored).collect()
}

/// Gradient of `sum(out * dout)` with respect to `qkv`, `[B, T, 3C]`.
pub fn backward<R: Real>(qkv: &[R], dout: &[R], d: Dims) -> Vec<R> {
    let size = d.c / d.heads;
    let scale = R::one() / R::from_f64(size as f64).sqrt();
    let mut dqkv = vec![R::zero(); qkv.len()];
    let place = |b: usize, t: usize, part: usize, head: usize| (b * d.t + t) * 3 * d.c + part * d.c + head * size;
    for b in 0..d.b {
        for t in 0..d.t {
            for head in 0..d.heads {
                let p = probabilities(qkv, d, b, t, head);
                let dout = &dout[(b * d.t + t) * d.c + head * size..][..size];
                let mut dp = vec![R::zero(); d.t];
                let mut delta = R::zero();
                for s in 0..d.t {
                    for i in 0..size {
                        dp[s] += dout[i] * at(qkv, d, b, s, 2, head, i);
                        dqkv[place(b, s, 2, head) + i] += p[s] * dout[i];
                    }
                    delta += p[s] * dp[s];
                }
                for s in 0..d.t {
                    let ds = (p[s] * (dp[s] - delta)).stored() * scale;
                    for i in 0..size {
                        dqkv[place(b, t, 0, head) + i] += ds * at(qkv, d, b, s, 1, head, i);
                        dqkv[place(b, s, 1, head) + i] += ds * at(qkv, d, b, t, 0, head, i);
                    }
                }
            }
        }
    }
    dqkv.into_iter().map(R::stored).collect()
}
