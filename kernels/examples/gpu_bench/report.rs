//! Lines of figures while measuring, and a table at the end.

/// Rows of the table: a name and figures.
#[derive(Default, Debug)]
pub struct Report(Vec<(String, String)>);

impl Report {
    pub fn heading(&mut self, words: &str) {
        println!("\n{words}");
        self.0.push((words.to_string(), String::new()));
    }

    /// A line now and a row of the table.
    pub fn row(&mut self, name: &str, figures: String) {
        println!("{name:<38} {figures}");
        self.0.push((name.to_string(), figures));
    }

    pub fn print(&self) {
        println!("\n-- table");
        self.0.iter().for_each(|(name, figures)| println!("{name:<38} {figures}"));
    }
}
