//! `loss.png`: the loss over the steps, as measured and smoothed, and that of samples that are held out.

use std::io::Cursor;
use std::ops::Range;
use std::sync::Once;

use image::{ImageFormat, RgbImage, imageops};
use plotters::coord::ranged1d::{KeyPointHint, NoDefaultFormatting, ValueFormatter};
use plotters::prelude::*;
use plotters::style::register_font;

use super::metrics::Line;
use super::run_dir::RunDir;
use crate::error::{Error, Result};

/// Name of the picture in the run's directory.
pub const LOSS_PNG: &str = "loss.png";

const WIDTH: u32 = 1000;
const HEIGHT: u32 = 600;
/// Drawn this much larger and then scaled down, which smooths lines and letters.
const SCALE: u32 = 3;

const RAW: RGBColor = RGBColor(168, 196, 232);
const SMOOTH: RGBColor = RGBColor(23, 78, 166);
const VALIDATION: RGBColor = RGBColor(214, 107, 17);
const INK: RGBColor = RGBColor(40, 44, 52);
const GRID: RGBColor = RGBColor(226, 229, 234);

/// Draws the loss in `lines` to `loss.png` of `run`. With fewer than two measured losses there is nothing to draw, and nothing
/// is written.
///
/// # Errors
/// [`Error::File`] when the file cannot be written.
pub fn write_loss(run: &RunDir, lines: &[Line], title: &str) -> Result<()> {
    // Of a loss its logarithm, which makes the axis logarithmic.
    let curve = |of: fn(&Line) -> Option<f64>| -> Vec<(f64, f64)> {
        let point = |line: &Line| Some((line.step as f64, of(line).filter(|loss| *loss > 0.0)?.log10()));
        lines.iter().filter_map(point).collect()
    };
    let points = curve(|line| line.loss);
    let validation = curve(|line| line.validation.as_ref()?.loss);
    if points.len() < 2 {
        return Ok(());
    }
    let fail = |e: &dyn std::fmt::Display| Error::file(run.path().join(LOSS_PNG), format!("cannot be drawn: {e}"));
    let mut pixels = vec![0; (WIDTH * HEIGHT * SCALE * SCALE * 3) as usize];
    draw(&mut pixels, &points, &validation, title).map_err(|e| fail(&e))?;
    let large = RgbImage::from_raw(WIDTH * SCALE, HEIGHT * SCALE, pixels).expect("as many bytes as the size says");
    let picture = imageops::thumbnail(&large, WIDTH, HEIGHT);
    let mut png = Cursor::new(Vec::new());
    picture.write_to(&mut png, ImageFormat::Png).map_err(|e| fail(&e))?;
    run.replace(LOSS_PNG, |out| out.write_all(png.get_ref()))
}

type DrawResult = std::result::Result<(), DrawingAreaErrorKind<<BitMapBackend<'static> as DrawingBackend>::ErrorType>>;

fn draw(pixels: &mut [u8], points: &[(f64, f64)], validation: &[(f64, f64)], title: &str) -> DrawResult {
    static FONT: Once = Once::new();
    FONT.call_once(|| {
        let font = include_bytes!("../../assets/fonts/DejaVuSans-ascii.ttf");
        assert!(register_font("sans-serif", FontStyle::Normal, font).is_ok(), "the embedded font is a font");
    });
    let px = |n: u32| n * SCALE;
    let text = |size: u32| TextStyle::from(("sans-serif", px(size)).into_font()).color(&INK);
    let smooth = smooth(points);

    let root = BitMapBackend::with_buffer(pixels, (px(WIDTH), px(HEIGHT))).into_drawing_area();
    root.fill(&WHITE)?;
    let first = points[0].0.min(0.0);
    let last = points[points.len() - 1].0.max(first + 1.0);
    let mut chart = ChartBuilder::on(&root)
        .caption(title, text(20))
        .margin(px(14))
        .margin_right(px(28))
        .x_label_area_size(px(48))
        .y_label_area_size(px(72))
        .build_cartesian_2d(first..last, LogAxis(value_range(&[points, validation].concat())))?;
    chart
        .configure_mesh()
        .bold_line_style(GRID.stroke_width(px(1)))
        .light_line_style(TRANSPARENT)
        .axis_style(INK.stroke_width(px(1)))
        .label_style(text(14))
        .axis_desc_style(text(15))
        .x_desc("training step")
        .y_desc("loss (MSE + variational bound, log scale)")
        .x_labels(8)
        .x_label_formatter(&|step| format!("{step:.0}"))
        .draw()?;
    let mut curve = |points: &[(f64, f64)], color: RGBColor, width: u32, name: &str| -> DrawResult {
        let key = move |(x, y)| PathElement::new(vec![(x, y), (x + px(22) as i32, y)], color.stroke_width(px(3)));
        chart.draw_series(LineSeries::new(points.iter().copied(), color.stroke_width(width)))?.label(name).legend(key);
        Ok(())
    };
    curve(points, RAW, px(1), "measured")?;
    curve(&smooth, SMOOTH, px(2), "smoothed")?;
    if !validation.is_empty() {
        curve(validation, VALIDATION, px(2), "validation")?;
        // One alone is no line.
        chart.draw_series(validation.iter().map(|&at| Circle::new(at, px(4), VALIDATION.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .legend_area_size(px(30))
        .margin(px(12))
        .background_style(WHITE.mix(0.85))
        .border_style(GRID.stroke_width(px(1)))
        .label_font(text(14))
        .draw()?;
    root.present()
}

/// An axis of logarithms whose labels are the numbers themselves.
struct LogAxis(Range<f64>);

impl Ranged for LogAxis {
    type FormatOption = NoDefaultFormatting;
    type ValueType = f64;

    fn map(&self, y: &f64, (bottom, top): (i32, i32)) -> i32 {
        let share = (y - self.0.start) / (self.0.end - self.0.start);
        bottom + (share * f64::from(top - bottom)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        ticks(&self.0)
    }

    fn range(&self) -> Range<f64> {
        self.0.clone()
    }
}

impl ValueFormatter<f64> for LogAxis {
    fn format_ext(&self, y: &f64) -> String {
        short(10f64.powf(*y))
    }
}

/// The mean of the points around each, about a twentieth of all; fewer at both ends, so that no end is pulled.
fn smooth(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let reach = (points.len() / 40).max(2);
    let mean = |i: usize| {
        let reach = reach.min(i).min(points.len() - 1 - i);
        let around = &points[i - reach..=i + reach];
        (points[i].0, around.iter().map(|(_, y)| y).sum::<f64>() / around.len() as f64)
    };
    (0..points.len()).map(mean).collect()
}

/// From a little below the smallest to a little above the largest value.
fn value_range(points: &[(f64, f64)]) -> Range<f64> {
    let (low, high) = points.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), &(_, y)| (l.min(y), h.max(y)));
    low - 0.06..high + 0.06
}

/// Logarithms of round numbers in `range`, a readable number of them.
fn ticks(range: &Range<f64>) -> Vec<f64> {
    let (first, last) = (range.start.floor() as i32, range.end.ceil() as i32);
    let decades = last - first;
    let digits: &[f64] = match range.end - range.start {
        ..0.4 => &[
            1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 1.9, 2.0, 2.2, 2.5, 2.8, 3.0, 3.5, 4.0, 4.5, 5.0, 6.0, 7.0,
            8.0, 9.0,
        ],
        ..1.2 => &[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
        ..4.0 => &[1.0, 2.0, 5.0],
        _ => &[1.0],
    };
    let step = (decades / 10 + 1) as usize;
    let all = (first..=last).step_by(step).flat_map(|decade| digits.iter().map(move |d| d.log10() + f64::from(decade)));
    all.filter(|y| range.contains(y)).collect()
}

/// A number with two significant digits: 0.035, 1.2, 40.
fn short(x: f64) -> String {
    let digits = (1.0 - x.abs().log10().floor()).clamp(0.0, 12.0) as usize;
    let text = format!("{x:.digits$}");
    if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.').to_string() } else { text }
}

#[cfg(test)]
mod tests {
    use super::super::config::TrainConfig;
    use super::super::metrics::Means;
    use super::*;

    fn lines(n: u64) -> Vec<Line> {
        let loss = |k: u64| {
            0.06 + 1.2 * (-(k as f64) / 9.0).exp() * (1.0 + 0.3 * (k as f64 * 2.1).sin()) + 0.01 * (k as f64).sin()
        };
        (1..=n).map(|k| Line { step: 10 * k, loss: Some(loss(k)), ..Line::default() }).collect()
    }

    #[test]
    fn the_picture_shows_both_curves() {
        let place = tempfile::tempdir().unwrap();
        let config = TrainConfig { out: place.path().join("run").display().to_string(), ..TrainConfig::default() };
        let run = RunDir::create(&config).unwrap();
        write_loss(&run, &lines(1), "digits").unwrap();
        assert!(!run.path().join(LOSS_PNG).exists(), "one point is no curve");
        write_loss(&run, &lines(60), "digits, paper routing").unwrap();
        let picture = image::open(run.path().join(LOSS_PNG)).unwrap().to_rgb8();
        assert_eq!(picture.dimensions(), (WIDTH, HEIGHT));
        let near = |picture: &RgbImage, color: RGBColor| {
            let close =
                |p: &&image::Rgb<u8>| p.0.iter().zip([color.0, color.1, color.2]).all(|(&a, b)| a.abs_diff(b) < 12);
            picture.pixels().filter(close).count()
        };
        let found = [RAW, SMOOTH, INK, VALIDATION].map(|color| near(&picture, color));
        assert!(found[0] > 300 && found[1] > 800 && found[2] > 1000 && found[3] == 0, "{found:?}");
        // Above the others, where it would not be seen if the axis ended with them.
        let mut lines = lines(60);
        for line in lines.iter_mut().skip(9).step_by(10) {
            line.validation = Some(Means { loss: line.loss.map(|loss| loss + 2.0), ..Means::default() });
        }
        write_loss(&run, &lines, "digits, paper routing").unwrap();
        let picture = image::open(run.path().join(LOSS_PNG)).unwrap().to_rgb8();
        assert!(near(&picture, VALIDATION) > 400, "{}", near(&picture, VALIDATION));
        lines.iter_mut().filter(|line| line.step != 300).for_each(|line| line.validation = None);
        write_loss(&run, &lines, "digits, paper routing").unwrap();
        let alone = near(&image::open(run.path().join(LOSS_PNG)).unwrap().to_rgb8(), VALIDATION);
        // Beside what the legend has of it, which is less than 80.
        assert!(alone > 90, "{alone}");
    }

    #[test]
    fn odd_values_do_not_stop_the_drawing() {
        let place = tempfile::tempdir().unwrap();
        let config = TrainConfig { out: place.path().join("run").display().to_string(), ..TrainConfig::default() };
        let run = RunDir::create(&config).unwrap();
        for losses in
            [[Some(1.0), Some(1.0), None], [Some(1e-30), Some(1e30), Some(-1.0)], [Some(0.0), Some(5.0), Some(5.0)]]
        {
            let lines: Vec<Line> =
                losses.iter().zip(1..).map(|(&loss, step)| Line { step, loss, ..Line::default() }).collect();
            write_loss(&run, &lines, "odd").unwrap();
            assert!(run.path().join(LOSS_PNG).exists());
        }
    }

    #[test]
    fn smoothing_keeps_a_constant_and_labels_are_short() {
        let flat: Vec<_> = (0..100).map(|k| (k as f64, 0.5)).collect();
        assert!(smooth(&flat).iter().all(|(_, y)| (y - 0.5).abs() < 1e-12));
        assert_eq!([0.035, 0.1, 1.25, 40.0, 100.0].map(short), ["0.035", "0.1", "1.2", "40", "100"]);
    }
}
