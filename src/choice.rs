//! Enums whose values have names that users write, such as `--routing paper`.

/// Names the variants of an enum: `Display`, `FromStr`, and all names in `NAMES`.
macro_rules! choice {
    ($type:ident: $first:ident = $name:literal $(, $variant:ident = $text:literal)*) => {
        impl $type {
            /// All names, as help texts show them.
            pub const NAMES: &'static str = concat!($name $(, "|", $text)*);
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(match self {
                    $type::$first => $name,
                    $($type::$variant => $text,)*
                })
            }
        }

        impl std::str::FromStr for $type {
            type Err = $crate::error::Error;

            fn from_str(text: &str) -> $crate::error::Result<Self> {
                match text {
                    $name => Ok($type::$first),
                    $($text => Ok($type::$variant),)*
                    _ => Err($crate::error::Error::usage(format!("'{text}' is none of {}", Self::NAMES.replace('|', ", ")))),
                }
            }
        }
    };
}

pub(crate) use choice;
