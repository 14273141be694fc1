# The public names of adaptc.methods that lie in rooms above it, for type checkers. At run time the package looks them
# up by the strings of its table.
from adaptc.adapters.arrow_adapter import arrow_adapter as arrow_adapter
from adaptc.adapters.intruders import reduce_intruder_dimension as reduce_intruder_dimension
from adaptc.api.adapt_model import create_arrow_model as create_arrow_model
from adaptc.training.from_data.initialize import initialize_from_data as initialize_from_data
from adaptc.verification.check_method import check_method as check_method
